"""How results look: figures, tables and the report."""

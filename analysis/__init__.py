"""Numbers in, numbers out: no model and no file is read here."""

"""Chat templates for the tiny tokenizer."""

from support.tiny_models import tiny_tokenizer

OPEN = "{% if add_generation_prompt %}<bos>a: {% endif %}"
TURNS = "{% for m in messages %}<bos>{{ m.role[0] }}: {{ m.content }}<eos>{% endfor %}"
TEMPLATE = TURNS + OPEN


def chatting(template=TEMPLATE):
    """Return the tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer

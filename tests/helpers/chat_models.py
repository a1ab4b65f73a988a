"""Chat templates for the tiny tokenizer, and tiny models saved with a tokenizer."""

from support.tiny_models import tiny_tokenizer

OPEN = "{% if add_generation_prompt %}<bos>a: {% endif %}"
TURNS = "{% for m in messages %}<bos>{{ m.role[0] }}: {{ m.content }}<eos>{% endfor %}"
TEMPLATE = TURNS + OPEN


def chatting(template=TEMPLATE):
    """Return the tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def saved(model, folder, tokenizer=None):
    """Save a model as `load_model` reads it, and return the folder's name."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)

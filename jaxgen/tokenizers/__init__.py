"""Tokenizers of released models, read from their folders; they need `jaxgen[hf]`."""

from jaxgen.tokenizers.clip import ClipTokenizer as ClipTokenizer
from jaxgen.tokenizers.t5 import T5Tokenizer as T5Tokenizer
from jaxgen.tokenizers.text_tokenizer import TextTokenizer as TextTokenizer

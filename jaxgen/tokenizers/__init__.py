"""Tokenizers of released text encoders, read from their folders; they need `jaxgen[hf]`."""

from jaxgen.tokenizers.clip import ClipTokenizer as ClipTokenizer
from jaxgen.tokenizers.t5 import T5Tokenizer as T5Tokenizer

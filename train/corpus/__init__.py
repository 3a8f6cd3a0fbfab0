"""Text corpora for language models: files to tokens, tokens to batches.

`load_documents(open_source(path), ByteTokenizer())` gives the documents of a file or folder,
`load_documents(python_sources(), ByteTokenizer())` those that are on every machine, and
`Batches(documents.part("train", 0.01), context=4096, batch_size=8, seed=0)` what a model learns.
"""

from train.corpus.batches import Batches as Batches
from train.corpus.batches import one_pass as one_pass
from train.corpus.cache import load_documents as load_documents
from train.corpus.damage import DamagedDataError as DamagedDataError
from train.corpus.documents import Documents as Documents
from train.corpus.python_files import PythonFiles as PythonFiles
from train.corpus.python_files import python_sources as python_sources
from train.corpus.sources import Document as Document
from train.corpus.sources import FileSource as FileSource
from train.corpus.sources import Source as Source
from train.corpus.sources import open_source as open_source
from train.corpus.tokenizers import ByteTokenizer as ByteTokenizer
from train.corpus.tokenizers import ReleasedTokenizer as ReleasedTokenizer
from train.corpus.tokenizers import Tokenizer as Tokenizer

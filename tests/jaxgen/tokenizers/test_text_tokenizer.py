import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models

from jaxgen.tokenizers import TextTokenizer

QWEN = Path(__file__).parents[2] / "goldens/text_tokenizers/qwen"


@pytest.fixture(scope="module")
def qwen():
    return TextTokenizer.from_folder(QWEN)


@pytest.mark.parametrize("make", [jnp.array, np.array])
def test_decodes_arrays(qwen, make):
    ids = qwen.encode("The answer")
    rows = make([ids, ids[::-1]])
    assert qwen.decode(make(ids)) == qwen.decode(rows[0]) == "The answer"
    assert qwen.decode(make(ids)[:0]) == ""
    with pytest.raises(TypeError, match=r"ids must be ints, got array\("):
        qwen.decode(rows)
    for wrong in (make([1.0, 2.0]), make([True])):
        with pytest.raises(TypeError, match="ids must be ints, got"):
            qwen.decode(wrong)
    with pytest.raises(TypeError, match="iter"):
        qwen.decode(rows[0, 0])


def test_the_mask_that_a_folder_names(qwen, tmp_path):
    assert qwen.mask_id == qwen.token_id("<|MASK|>") == 461
    shutil.copytree(QWEN, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text())
    del values["mask_token"]
    path.write_text(json.dumps(values))
    assert TextTokenizer.from_folder(tmp_path).mask_id is None


def test_finds_added_tokens_and_splits_others(qwen):
    assert all(map(qwen.finds, ("<|im_end|>", "<think>", "T")))
    assert not any(map(qwen.finds, ("<|eot_id|>", "")))
    split = TextTokenizer(Tokenizer(models.BPE({"<": 0, "e": 1, ">": 2, "<e>": 3}, [])))
    assert "<e>" in split
    assert split.encode("<e>") == [0, 1, 2]
    assert split.finds("e")
    assert not split.finds("<e>")

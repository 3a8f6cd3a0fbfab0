"""Generated reasoning problems with exact verifiers, for diffusion language models.

    problem = arithmetic.arithmetic(level=3, number=0)
    ids = Vocabulary().encode(problem.prompt + problem.solution)
    arithmetic.verify(problem.prompt, problem.solution).correct

`train.problems.arithmetic` and `train.problems.sudoku` say what their tasks are.
"""

from train.problems import arithmetic as arithmetic
from train.problems import sudoku as sudoku
from train.problems.vocabulary import CHARACTERS as CHARACTERS
from train.problems.vocabulary import EOS as EOS
from train.problems.vocabulary import MASK as MASK
from train.problems.vocabulary import PAD as PAD
from train.problems.vocabulary import SPLITS as SPLITS
from train.problems.vocabulary import Problem as Problem
from train.problems.vocabulary import Verdict as Verdict
from train.problems.vocabulary import Vocabulary as Vocabulary

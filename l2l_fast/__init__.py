"""Learned optimizers fast enough to use: the coordinatewise LSTM of Andrychowicz et al. 2016."""

from importlib.metadata import version as _version

from l2l_fast.backends import backends as backends
from l2l_fast.meta import MetaTrainer as MetaTrainer
from l2l_fast.meta import TrainConfig as TrainConfig
from l2l_fast.meta import Unroll as Unroll
from l2l_fast.meta import unroll as unroll
from l2l_fast.optim import LearnedOptimizer as LearnedOptimizer
from l2l_fast.release import optimizer_in_backward as optimizer_in_backward
from l2l_fast.rule import CoordinatewiseLSTM as CoordinatewiseLSTM
from l2l_fast.rule import available_rules as available_rules
from l2l_fast.rule import load_rule as load_rule
from l2l_fast.spec import Identity as Identity
from l2l_fast.spec import LogAndSign as LogAndSign
from l2l_fast.spec import RuleSpec as RuleSpec

__version__ = _version("l2l_fast")

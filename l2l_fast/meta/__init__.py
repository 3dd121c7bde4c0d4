"""Unrolls, meta-training and what goes with it."""

from l2l_fast.meta.config import TrainConfig as TrainConfig
from l2l_fast.meta.diagnostics import Diagnosis as Diagnosis
from l2l_fast.meta.diagnostics import diagnose as diagnose
from l2l_fast.meta.graph import StepGraph as StepGraph
from l2l_fast.meta.imitation import Teacher as Teacher
from l2l_fast.meta.imitation import imitate as imitate
from l2l_fast.meta.log import TrainEvent as TrainEvent
from l2l_fast.meta.log import tensorboard as tensorboard
from l2l_fast.meta.search import SearchResult as SearchResult
from l2l_fast.meta.search import search as search
from l2l_fast.meta.trainer import MetaTrainer as MetaTrainer
from l2l_fast.meta.trainer import TrainResult as TrainResult
from l2l_fast.meta.unroll import Unroll as Unroll
from l2l_fast.meta.unroll import unroll as unroll

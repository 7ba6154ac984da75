"""Federated knowledge distillation for Keras models, on TensorFlow Federated."""

from tff_kd import algorithms
from tff_kd import communication
from tff_kd import data
from tff_kd import evaluation
from tff_kd import keras_models
from tff_kd import losses
from tff_kd import models
from tff_kd import simulation
from tff_kd.client_data import ClientBatches
from tff_kd.client_data import FileClientData
from tff_kd.client_work import LocalDistillation
from tff_kd.process import DistillationProcess
from tff_kd.process import DistillationState
from tff_kd.server_distillation import cosine_schedule
from tff_kd.server_distillation import Distillation
from tff_kd.transfer import TransferSet

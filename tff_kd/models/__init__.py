"""Keras models as functions of their weights, checked against data and loss."""

from tff_kd import _lazy
from tff_kd.models.batches import as_batch
from tff_kd.models.batches import check_input_spec
from tff_kd.models.batches import is_compatible
from tff_kd.models.batches import num_examples
from tff_kd.models.batches import sample_weight_of
from tff_kd.models.batches import split_batch
from tff_kd.models.batches import unmasked
from tff_kd.models.building import build_model_spec
from tff_kd.models.building import check_loss_fn
from tff_kd.models.building import check_metrics_fn
from tff_kd.models.building import check_model_fn
from tff_kd.models.building import is_builder
from tff_kd.models.building import LossFn
from tff_kd.models.labels import BINARY_LOSSES
from tff_kd.models.labels import wrong_labels
from tff_kd.models.labels import wrong_labels_message
from tff_kd.models.metrics import lower_is_better
from tff_kd.models.metrics import Metrics
from tff_kd.models.metrics import MetricsFn
from tff_kd.models.metrics import new_metrics
from tff_kd.models.metrics import TOTALS
from tff_kd.models.spec import apply_constraints
from tff_kd.models.spec import BoundModel
from tff_kd.models.spec import check_has_classes
from tff_kd.models.spec import check_same_outputs
from tff_kd.models.spec import KerasModelFn
from tff_kd.models.spec import ModelSpec
from tff_kd.models.spec import ModelValues

# Modules that import this package; they load when they are used.
__getattr__, _ = _lazy.attach(
    __name__, ['cohorts', 'embeddings', 'personal', 'split', 'stateless', 'zoo']
)

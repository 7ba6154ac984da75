"""Keras models as functions of their weights, checked against data and loss."""

from tff_kd import _lazy
from tff_kd.models.metrics import lower_is_better
from tff_kd.models.metrics import Metrics
from tff_kd.models.metrics import MetricsFn
from tff_kd.models.metrics import new_metrics
from tff_kd.models.metrics import TOTALS
from tff_kd.models.spec import apply_constraints
from tff_kd.models.spec import as_batch
from tff_kd.models.spec import BINARY_LOSSES
from tff_kd.models.spec import BoundModel
from tff_kd.models.spec import build_model_spec
from tff_kd.models.spec import check_has_classes
from tff_kd.models.spec import check_input_spec
from tff_kd.models.spec import check_loss_fn
from tff_kd.models.spec import check_metrics_fn
from tff_kd.models.spec import check_model_fn
from tff_kd.models.spec import check_same_outputs
from tff_kd.models.spec import is_builder
from tff_kd.models.spec import is_compatible
from tff_kd.models.spec import KerasModelFn
from tff_kd.models.spec import LossFn
from tff_kd.models.spec import ModelSpec
from tff_kd.models.spec import ModelValues
from tff_kd.models.spec import num_examples
from tff_kd.models.spec import sample_weight_of
from tff_kd.models.spec import split_batch
from tff_kd.models.spec import wrong_labels
from tff_kd.models.spec import wrong_labels_message

# Modules that build on these.
__getattr__, _ = _lazy.attach(
    __name__,
    {
        name: name
        for name in ('cohorts', 'embeddings', 'personal', 'split', 'stateless', 'zoo')
    },
)

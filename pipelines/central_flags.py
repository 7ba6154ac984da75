"""The flags of central training; imports no TensorFlow."""

from absl import flags

from pipelines import topics

topics.topic('Training in one place')
EPOCHS = flags.DEFINE_integer(
    'central_epochs', 20, 'Passes over all examples, at most: ends when the validation '
    'score was not better for 3 of them, and keeps the best.', lower_bound=1,
)
LEARNING_RATE = flags.DEFINE_float(
    'central_learning_rate', 0.001, "Adam's.", lower_bound=0.0
)
BATCH_SIZE = flags.DEFINE_integer(
    'central_batch_size', 32, 'Examples a step.', lower_bound=1
)
# The flags of pipelines.train that define the models and the data, or name a run that
# does.
OF_TRAIN = frozenset({
    'task', 'data_dir', 'student', 'teacher', 'num_clients', 'seed', 'transfer_size',
    'validation_size', 'output_dir', 'config',
})

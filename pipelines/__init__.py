"""Scripts: absl flags and plots, no mathematics."""

import os
import warnings

# Before TensorFlow is imported: keeps its start-up notes off the screen.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
warnings.filterwarnings('ignore', message='pkg_resources is deprecated')

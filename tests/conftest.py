"""What all tests need before TensorFlow is imported."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# Ranks that are threads all block inside TensorFlow's pool at once; two threads, as a machine of
# two cores gives it, would never be enough.
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "16")
# Else gcsfs asks each bucket for its kind over gRPC, which no emulator answers.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

"""Keras's callbacks, correct on any number of ranks."""

from orchestrator.callbacks.backup_and_restore import BackupAndRestore
from orchestrator.callbacks.consistency_guard import ConsistencyGuard
from orchestrator.callbacks.csv_logger import CSVLogger
from orchestrator.callbacks.early_stopping import EarlyStopping
from orchestrator.callbacks.global_metrics import GlobalMetrics
from orchestrator.callbacks.model_checkpoint import ModelCheckpoint
from orchestrator.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
from orchestrator.callbacks.store_checkpoint import StoreCheckpoint

__all__ = [
    "BackupAndRestore",
    "CSVLogger",
    "ConsistencyGuard",
    "EarlyStopping",
    "GlobalMetrics",
    "ModelCheckpoint",
    "ReduceLROnPlateau",
    "StoreCheckpoint",
]

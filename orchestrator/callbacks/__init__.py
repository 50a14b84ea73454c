"""Keras's callbacks, and Horovod's, correct on any number of ranks."""

from orchestrator.callbacks.backup_and_restore import BackupAndRestore
from orchestrator.callbacks.broadcast_global_variables import BroadcastGlobalVariables
from orchestrator.callbacks.consistency_guard import ConsistencyGuard
from orchestrator.callbacks.csv_logger import CSVLogger
from orchestrator.callbacks.early_stopping import EarlyStopping
from orchestrator.callbacks.global_metrics import GlobalMetrics
from orchestrator.callbacks.lambda_callback import LambdaCallback
from orchestrator.callbacks.learning_rate_schedule_callback import LearningRateScheduleCallback
from orchestrator.callbacks.learning_rate_scheduler import LearningRateScheduler
from orchestrator.callbacks.learning_rate_warmup import LearningRateWarmup
from orchestrator.callbacks.learning_rate_warmup_callback import LearningRateWarmupCallback
from orchestrator.callbacks.metric_average import MetricAverage
from orchestrator.callbacks.model_checkpoint import ModelCheckpoint
from orchestrator.callbacks.rank_aware import RankAware
from orchestrator.callbacks.rank_zero import RankZero
from orchestrator.callbacks.reduce_lr_on_plateau import ReduceLROnPlateau
from orchestrator.callbacks.remote_monitor import RemoteMonitor
from orchestrator.callbacks.scaling import scaled_learning_rate
from orchestrator.callbacks.store_checkpoint import StoreCheckpoint
from orchestrator.callbacks.stragglers import Stragglers
from orchestrator.callbacks.swap_ema_weights import SwapEMAWeights
from orchestrator.callbacks.tensorboard import TensorBoard
from orchestrator.callbacks.terminate_on_nan import TerminateOnNaN

# As Horovod names them.
BroadcastGlobalVariablesCallback = BroadcastGlobalVariables
MetricAverageCallback = MetricAverage

__all__ = [
    "BackupAndRestore",
    "BroadcastGlobalVariables",
    "BroadcastGlobalVariablesCallback",
    "CSVLogger",
    "ConsistencyGuard",
    "EarlyStopping",
    "GlobalMetrics",
    "LambdaCallback",
    "LearningRateScheduleCallback",
    "LearningRateScheduler",
    "LearningRateWarmup",
    "LearningRateWarmupCallback",
    "MetricAverage",
    "MetricAverageCallback",
    "ModelCheckpoint",
    "RankAware",
    "RankZero",
    "ReduceLROnPlateau",
    "RemoteMonitor",
    "StoreCheckpoint",
    "Stragglers",
    "SwapEMAWeights",
    "TensorBoard",
    "TerminateOnNaN",
    "scaled_learning_rate",
]

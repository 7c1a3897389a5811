"""Every option of a run, a module a section: default, meaning, limits. `config_file` reads and writes them."""

from cxr_vae.config.data import DataConfig
from cxr_vae.config.evaluation import EvaluateConfig
from cxr_vae.config.model import ARCHITECTURES, ModelConfig
from cxr_vae.config.objective import ObjectiveConfig, OptimizerConfig
from cxr_vae.config.prior import PriorConfig
from cxr_vae.config.run import OPTIONS, SECTIONS, Config, ResourcesConfig, check_batch
from cxr_vae.config.section import MAY_CHANGE, Section
from cxr_vae.config.training import CheckpointConfig, TrainConfig

__all__ = [
    "ARCHITECTURES",
    "MAY_CHANGE",
    "OPTIONS",
    "SECTIONS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluateConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PriorConfig",
    "ResourcesConfig",
    "Section",
    "TrainConfig",
    "check_batch",
]

"""Training on cached teacher scores with Hugging Face's Trainer, or with one that is made of it.

    trainer = CachedDistillationTrainer(
        model, arguments, scores="store/scores/3f0c…", objectives=[Bucket()], window_tokens=512
    )
    trainer.train()

docs/trainers.md says what is the same as in opd-stream's own training, and how trl's SFTTrainer
trains on a cache.
"""

from opd_stream.trainers.cached_data import CachedCollator, CachedDataset, CacheOrder
from opd_stream.trainers.cached_loss import CachedDistillationTrainer, CachedLoss
from opd_stream.trainers.serving import check_served

__all__ = [
    "CacheOrder",
    "CachedCollator",
    "CachedDataset",
    "CachedDistillationTrainer",
    "CachedLoss",
    "check_served",
]

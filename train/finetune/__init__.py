"""Fine-tuning on labeled tasks, and embedding models by contrastive training."""

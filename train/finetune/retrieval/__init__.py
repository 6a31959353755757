"""Training a bi-encoder for retrieval: `python -m train finetune --task retrieval`."""

from .config import RetrievalConfig as RetrievalConfig
from .data import described as described
from .run import retrieval_facts as retrieval_facts, train as train

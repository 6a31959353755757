"""ModernBERT in pure Flax (NNX).

Axis letters, used in the names of arrays, in einsums, in sharding and in docstrings:

    B sequences   L query length   M key length   D model   H heads   K head dim   F MLP inner
    V vocabulary   N layers   P predicted positions   S segments of a sequence   R rank

`hidden_BLD` is [sequences, length, model]; a scalar has no suffix; 1 marks a broadcast axis.
"""

from modernbert_jax import lora as lora, losses as losses
from modernbert_jax.auto import (
    AutoConfig as AutoConfig,
    AutoModel as AutoModel,
    AutoModelForMaskedLM as AutoModelForMaskedLM,
    AutoModelForMultipleChoice as AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering as AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification as AutoModelForSequenceClassification,
    AutoModelForTokenClassification as AutoModelForTokenClassification,
)
from modernbert_jax.checkpoint.pretrained import Pretrained as Pretrained
from modernbert_jax.config import ModernBertConfig as ModernBertConfig
from modernbert_jax.heads import (
    ModernBertForMaskedLM as ModernBertForMaskedLM,
    ModernBertForMultipleChoice as ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering as ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification as ModernBertForSequenceClassification,
    ModernBertForTokenClassification as ModernBertForTokenClassification,
    pool as pool,
)
from modernbert_jax.inference.embedder import Embedder as Embedder
from modernbert_jax.inference.inspect import capture as capture
from modernbert_jax.inference.multi_vector import MultiVectorEmbedder as MultiVectorEmbedder
from modernbert_jax.inference.pipelines import (
    FeatureExtraction as FeatureExtraction,
    FillMask as FillMask,
    QuestionAnswering as QuestionAnswering,
    Reranker as Reranker,
    TextClassification as TextClassification,
    TokenClassification as TokenClassification,
    ZeroShotClassification as ZeroShotClassification,
    pipeline as pipeline,
)
from modernbert_jax.model import ModernBertModel as ModernBertModel
from modernbert_jax.quantization import quantize as quantize
from modernbert_jax.sharding import shard_params as shard_params
from modernbert_jax.tokenizer import AutoTokenizer as AutoTokenizer

__version__ = "0.1.0"

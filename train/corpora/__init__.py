"""Where text comes from: readers, a synthetic corpus, and the training of tokenizers."""

"""Reports on corpora: the catalogue, the mixture, contamination of evaluation sets."""

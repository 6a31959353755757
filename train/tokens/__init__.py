"""Token folders on disk, ours or MosaicML's MDS, and chunks of tokens by number."""

"""The hidden-state losses, one a file; :data:`megatron_phf.hidden.term.TERMS` names them."""

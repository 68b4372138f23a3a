"""The same of hidden states and vocabulary heads: the logits of all rows never exist at once."""

"""`token_log_probs`: log-probability of one token for each row of logits, without the log-probabilities of all others in memory.

Every twin has `token_log_probs(logits, tokens) ▸ [...] float32`, nats: logits `[..., V]` of any float type, tokens int64 `[...]`. A row
with a NaN or a logit of +inf gives NaN, as log-softmax does. Of a token outside the vocabulary torch raises; Triton gives NaN.
"""

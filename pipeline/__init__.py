"""The domain: token bytes, alignment, support, models, sampling, scoring, the cache, credit and drift."""

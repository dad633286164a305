"""A cached rollout seen with its teacher scores: read from the store, nothing is computed anew."""

"""The artifact store: content-addressed folders of verified Arrow shards and policies."""

"""The contracts: Arrow tables, the config model, manifests and the error for people. Depends on nothing of ours."""

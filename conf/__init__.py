"""The Hydra groups, shipped as the package ``dataparams.conf``."""

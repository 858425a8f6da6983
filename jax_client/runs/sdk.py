"""Which names of the tinker SDK that are not public does this package use, and of which versions of the SDK?

This module imports all of them, and other modules import them from here, so that a new version of the SDK is checked
against one file.
"""

from tinker.lib._auth_token_provider import AuthTokenProvider
from tinker.lib.internal_client_holder import ClientConnectionPool, InternalClientHolder
from tinker.lib.public_interfaces.custom_loss import check_loss_inputs, run_loss_handle, trace_loss
from tinker.lib.retry_handler import RetryConfig
from tinker.proto import tinker_public_pb2
from tinker.types.optimizer import OptimParamsBase
from tinker.types.topk_logprobs import MASK_LOGPROB, TopkLogprobs

# The SDK versions in which these names were checked, as pyproject.toml requires them.
SDK_VERSIONS = ">=0.38,<0.39"

__all__ = [
    "MASK_LOGPROB",
    "SDK_VERSIONS",
    "AuthTokenProvider",
    "ClientConnectionPool",
    "InternalClientHolder",
    "OptimParamsBase",
    "RetryConfig",
    "TopkLogprobs",
    "check_loss_inputs",
    "run_loss_handle",
    "tinker_public_pb2",
    "trace_loss",
]

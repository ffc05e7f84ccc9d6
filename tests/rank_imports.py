"""What a rank of a trainer imports, imported once by the server that ranks are forked from."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for one when it is imported

import deepspeed  # noqa: F401
import torch._dynamo  # noqa: F401  (what an optimizer's first construction imports)

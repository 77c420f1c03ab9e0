"""Text-to-image models that can denoise, loaded from diffusers folders: the only room that knows diffusers
and peft.
"""

from __future__ import annotations

import os

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

# Their notices (torchvision is absent, a text was cut) and bars would cut through our progress lines; what
# matters of it we check and count ourselves. A user who sets the libraries' own variables gets them back.
if "TRANSFORMERS_VERBOSITY" not in os.environ:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
if "DIFFUSERS_VERBOSITY" not in os.environ:
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()

"""Text-to-image models that can denoise, loaded from diffusers folders: the only room that knows diffusers
and peft."""

from __future__ import annotations

import os

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

# Their notices (torchvision is absent, a text was cut) and bars would cut through our progress lines; what
# matters of it we check and count ourselves. A user who sets the libraries' own variables gets them back.
for _name, _logging in (("TRANSFORMERS", transformers_logging), ("DIFFUSERS", diffusers_logging)):
    if f"{_name}_VERBOSITY" not in os.environ:
        _logging.set_verbosity_error()
        _logging.disable_progress_bar()

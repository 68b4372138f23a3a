"""LoRA is optional."""

import pytest

from minillm.model.adapters import adapters_unavailable

needs_adapters = pytest.mark.skipif(bool(adapters_unavailable()), reason=str(adapters_unavailable()))

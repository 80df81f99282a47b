# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""What `scripts/benchmark.py` is made of: measurements in processes of their own, the models measured, and tables."""

# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""Data: the generated scenes, recipes of public data sets, loading and augmentation."""

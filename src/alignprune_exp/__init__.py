"""Robust dynamic data pruning: AlignPrune (CVPR 2026) and the experiments around it."""

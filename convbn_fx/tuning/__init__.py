"""Knows how a whole model stays itself while its pairs are fused: explored, copied, given tuned classes, run.

Must not know of Deploy mode, nor what users call (`api`). A forward is explored by tracing it (`fx`).
"""

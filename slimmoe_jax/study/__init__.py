"""Ablation studies: their design, the running and measuring of their arms, statistics, figures and reports."""

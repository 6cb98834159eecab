"""Submission of jobs to Ray clusters."""

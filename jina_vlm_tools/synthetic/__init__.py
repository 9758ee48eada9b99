"""Drawn images with questions whose answers are known: shapes and pages, in several languages."""

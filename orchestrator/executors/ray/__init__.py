"""Runs requests on Ray actors. The only package that imports ray."""

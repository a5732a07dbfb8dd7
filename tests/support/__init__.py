"""Servers, browsers, processes and helpers that tests of several folders share."""

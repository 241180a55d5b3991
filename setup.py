"""The packages of the wheel, by rule: the root is `sapwood`, each folder with an `__init__.py` a package in it."""

from setuptools import find_packages, setup

setup(script_name="setup.py", packages=["sapwood", *(f"sapwood.{name}" for name in find_packages("."))])

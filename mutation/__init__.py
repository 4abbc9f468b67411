"""Mutation testing of the loss and gradient code: does a test fail when a formula is wrong?"""

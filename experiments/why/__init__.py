"""Why does SI work?"""

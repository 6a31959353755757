from modernbert_jax.cli import program

if __name__ == "__main__":
    program()

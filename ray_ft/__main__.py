from ray_ft.cli import main

main()

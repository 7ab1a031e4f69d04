# The program, its demo, and the arguments for building the checks.
{
  lib,
  installShellFiles,
  craneLib,
  # crane for the build platform
  buildCraneLib,
  # the program's passthru.tests
  tests,
}:
let
  fs = lib.fileset;
  source =
    files:
    fs.toSource {
      root = ../.;
      fileset = fs.unions files;
    };

  # The sources of the program. No other file changes its store path.
  program = [
    ../.cargo/config.toml
    ../Cargo.lock
    ../Cargo.toml
    ../src
    ../xtask
  ];
  sources = {
    program = source program;
    # all files that cargo compiles
    all = source (
      program
      ++ [
        ../benches
        (fs.difference ../examples ../examples/nixos)
        (fs.difference ../tests ../tests/systemd)
      ]
    );
    deny = source (program ++ [ ../deny.toml ]);
  };

  common = {
    strictDeps = true;
    # tests and the demo listen on loopback
    __darwinAllowLocalNetworking = true;
    # Build aws-lc from source, and never link a library of the system.
    env.AWS_LC_SYS_USE_SYSTEM = "0";
  };

  # The release profile without development dependencies: all that is built to install the program.
  releaseArgs = common // {
    src = sources.program;
    doCheck = false;
  };
  release = releaseArgs // {
    cargoArtifacts = craneLib.buildDepsOnly (
      releaseArgs // { buildPhaseCargoCommand = "cargoWithProfile build --locked"; }
    );
  };

  # For the demo and the checks: link-time optimisation of every test would take too long.
  devArgs = common // {
    src = sources.all;
    CARGO_PROFILE = "dev";
    env = common.env // {
      # glibc warns about nixpkgs' _FORTIFY_SOURCE where C code is not optimised
      CARGO_PROFILE_DEV_OPT_LEVEL = "1";
      CARGO_PROFILE_DEV_DEBUG = "line-tables-only";
    };
  };
  dev = devArgs // {
    cargoArtifacts = craneLib.buildDepsOnly devArgs;
    doInstallCargoArtifacts = false;
  };

  meta = {
    description = "Lets unprivileged users run Codex without holding the OpenAI API key";
    longDescription = ''
      A proxy on loopback that reads an OpenAI API key from its standard input,
      forwards POST /v1/responses with that key added, and rejects everything
      else. A drop-in replacement for OpenAI's codex-responses-api-proxy.
    '';
    license = [
      lib.licenses.mit
      lib.licenses.asl20
    ];
    mainProgram = "codex-responses-api-proxy";
    maintainers = [ ];
    platforms = lib.platforms.linux ++ lib.platforms.darwin;
  };

  # The man page and the completions, made on the build platform: a cross build cannot run its own output.
  assets = buildCraneLib.mkCargoDerivation {
    pname = "codex-responses-proxy-assets";
    src = sources.program;
    strictDeps = true;
    cargoArtifacts = null;
    doInstallCargoArtifacts = false;
    CARGO_PROFILE = "dev";
    buildPhaseCargoCommand = "cargoWithProfile run --locked --package xtask -- $out";
  };

  package = craneLib.buildPackage (
    release
    // {
      inherit meta;
      nativeBuildInputs = [ installShellFiles ];
      postInstall = ''
        installManPage ${assets}/${meta.mainProgram}.1
        installShellCompletion --cmd ${meta.mainProgram} \
          --bash ${assets}/${meta.mainProgram}.bash \
          --zsh ${assets}/_${meta.mainProgram} \
          --fish ${assets}/${meta.mainProgram}.fish
      '';
      doInstallCheck = true;
      installCheckPhase = ''
        runHook preInstallCheck
        $out/bin/${meta.mainProgram} --version | grep --fixed-strings "$version"
        runHook postInstallCheck
      '';
      # no path of the build in the output
      disallowedReferences = [
        assets
        package.cargoVendorDir
      ];
      passthru = { inherit assets tests; };
    }
  );

  demo = craneLib.buildPackage (
    dev
    // {
      pname = "codex-responses-proxy-demo";
      cargoBuildExtraArgs = "--example demo";
      # the check `nextest` runs the tests
      doCheck = false;
      postInstall = "mv $out/bin/demo $out/bin/codex-responses-proxy-demo";
      meta = meta // {
        description = "Demo of codex-responses-proxy that needs no account and no internet";
        mainProgram = "codex-responses-proxy-demo";
      };
    }
  );
in
{
  inherit
    craneLib
    package
    demo
    sources
    dev
    ;
}
